"""Pages of keys and values: who holds which, what requests share, what is given up first. No torch: numbers only."""

from trainkit.serving.kv_cache._pages import Held as Held
from trainkit.serving.kv_cache._pages import OutOfPages as OutOfPages
from trainkit.serving.kv_cache._pages import Pages as Pages
