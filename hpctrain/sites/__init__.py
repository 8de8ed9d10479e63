"""A site seen from here: its profile drafted and shown, files uploaded to it, a shell on it, its
nodes, its doctor."""
