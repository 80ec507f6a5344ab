"""The microkernel: vocabulary, messages, protocol, channels, actors, errors. Knows no model, no arrays and no gRPC."""
