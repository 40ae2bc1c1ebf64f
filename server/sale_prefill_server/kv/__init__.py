"""Where KV lives on the device."""
