"""Statistics of linear layers over calibration text: second moments of inputs and of output gradients."""
