"""Learning-rate schedules, with one file per family."""
