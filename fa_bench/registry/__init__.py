"""Options of components, and the tables in which components are registered."""
