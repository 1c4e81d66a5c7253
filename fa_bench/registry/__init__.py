"""What components are made of: their options, and the tables in which they are registered."""
