"""What is computed: options, the reduction itself by three backends, and its gradients.

Knows no model: imports torch and the kernels only.
"""
