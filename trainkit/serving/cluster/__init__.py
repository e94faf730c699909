"""The same scheduler on a cluster: Ray Serve carries it, as LitServe does on one machine. Needs the extra `cluster`."""

from trainkit.serving.cluster._application import application as application
from trainkit.serving.cluster._application import serve_on_ray as serve_on_ray
