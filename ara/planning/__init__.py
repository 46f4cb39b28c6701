"""What compressing a model will take: memory, disk, FLOPs and time of every stage, from its config alone."""
