"""What the lessons in notes/ share. Modules import downwards only; see README.md for the map."""
