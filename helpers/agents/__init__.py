"""What the lessons define and others use, written from their cells by `make agents`."""
