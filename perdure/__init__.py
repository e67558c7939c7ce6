"""The application: supervisor, control socket, command line."""
