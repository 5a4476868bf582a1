"""What runs the model: `llama` makes a `llama_cpp.Llama` elastic and governed.

`loading` opens one, `caches` and `sensing` choose its cache and where readings come from, `resting` gives what nobody
asks for, and `attach` puts methods in the place of others.
"""
