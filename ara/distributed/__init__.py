"""Several processes that do one piece of work, as torchrun starts them; see :class:`ara.distributed.group.Group`."""
