"""What every program here needs: devices, ranks, files, errors, parsing and running a command."""
