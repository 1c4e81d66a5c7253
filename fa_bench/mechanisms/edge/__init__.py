"""Edge rules, which give every layer a feedback pathway."""
