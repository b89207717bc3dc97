"""What every program here needs: devices, ranks, files, errors, the frame of a command."""
