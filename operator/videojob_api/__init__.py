"""What a VideoJob means: names, spec, status, plan and progress.

Read by the operator and by the worker alike; knows neither of them, and neither torch nor any client.
"""
