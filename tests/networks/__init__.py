"""Rules on published networks of other packages."""
