"""A pack on a quantized model, as a stand-in for a phone. Imports `packs` and what is below it."""
