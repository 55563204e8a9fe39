"""Requirements of a job before it is paid for: topologies, memory, time."""
