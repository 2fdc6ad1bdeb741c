"""What happens before a command does its work: memory, imports, and what the libraries may print."""
