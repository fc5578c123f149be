"""What a run is and where it lies: fingerprints, checkpoints, and the devices that it is on."""
