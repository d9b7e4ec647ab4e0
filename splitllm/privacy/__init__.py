"""What is hidden in a round: sums of which a server sees only the sum, and noise that hides each client in it.

Plain values and arrays in, plain values and arrays out: no sockets, no models, no clock.
"""
