"""One module for each command or group of commands; each is a thin call into the packages."""
