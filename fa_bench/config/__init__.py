"""Turns YAML configs into checked jobs, and defines their identities and labels."""
