"""What keeps a repository in order: pruning, checking, repairing, auditing."""
