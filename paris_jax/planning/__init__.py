"""What a job needs before it is paid for: topologies, memory, time."""
