"""Everything that is not the method: command line, files, prepared data, devices, other people's models."""
