"""What one lesson alone needs: facts of films, news, simulated users, several machines."""
