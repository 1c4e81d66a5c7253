"""Edge rules: a feedback pathway for every layer."""
