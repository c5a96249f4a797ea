"""The SO-100/SO-101 arm: its bus, its servos, the backend, and an emulator that speaks the same bytes."""
