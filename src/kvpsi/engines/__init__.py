"""What runs the model: `llama` makes a `llama_cpp.Llama` elastic and governed.

`loading` opens one, `caches` and `sensing` choose its cache and where readings come from, `resting` gives what nobody
asks for, and `attach` puts methods in the place of others. `vllm` does the same for vLLM on processors, and `kvcached`
drives the limit of caches on GPUs.
"""
