"""A whole Kubernetes on one machine, without Docker: built once, booted in seconds.

``build`` makes the binaries, ``network`` the bridge, ``process`` runs and ends daemons, ``control_plane`` and ``node``
know one component each, ``images`` writes the container images, ``cluster`` composes them.
"""
