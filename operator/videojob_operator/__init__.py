"""Turns VideoJobs into Jobs and keeps their status: handlers -> keeper -> reconcile -> job, status -> cluster.

``job``, ``failure`` and ``status`` are pure; ``cluster`` is the only module that talks to Kubernetes.
"""
