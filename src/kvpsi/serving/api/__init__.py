"""The HTTP API, in OpenAI's form.

`app` puts it together; one file for each group of paths; `schema` is what clients send, `errors` what they hear when
something is wrong.
"""
