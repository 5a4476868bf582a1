"""Tokens a second and waiting times over HTTP, beside other servers of the same model.

`prompts` draws what is asked, `servers` starts whom is asked, `client` asks and takes the time, `run` repeats it.
"""
