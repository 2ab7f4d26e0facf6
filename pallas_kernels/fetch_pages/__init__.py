"""Moves pages between a store, in host memory or on the device, and slots on the device."""
