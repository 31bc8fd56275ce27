"""A whole Kubernetes on one machine, without Docker: built once, booted in seconds.

``preflight`` says what a machine lacks and ``build`` makes the binaries. ``state`` is the folder of one cluster, and
finds what a crashed run left; ``sandbox`` is the namespaces that hold everything and vanish with their owner (``guard``
is process 1 in them), ``network`` the bridge, ``cgroups`` the control groups. ``process`` runs and ends daemons,
``pki`` makes keys, ``control_plane``, ``dns`` and ``node`` know one component each, ``images`` writes the container
images, ``api`` makes the few calls that booting needs, and ``cluster`` composes them. ``access`` is what tests do with
any cluster, ``s3`` the object store beside it; ``fixtures`` hands both to pytest and ``__main__`` to a terminal.
"""
