"""What chooses ranks by looking at the model: switchable layers, sensitivity, probes, trainable masks."""
