"""Learning-rate schedules, one file per family."""
