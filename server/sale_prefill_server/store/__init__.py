"""Where KV goes when it leaves the device: host memory, local disk, a store that other servers see too."""
