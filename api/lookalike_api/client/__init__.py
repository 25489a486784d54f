"""Python client of the HTTP API.

    with Client("http://127.0.0.1:8760") as look:
        photos = look.add_subject_set("photos/", class_noun="dog")
        job = look.train(photos["id"], concept="rex")
        look.wait(job["id"], on_progress=print)
        picture = look.generate("<rex> on the moon", adapters=["rex"], wait=60)
        look.save_images(picture, "out/")

Answers are the API's JSON objects as dictionaries. Every error the API reports is raised as the
LookalikeError it was on the server, with its field paths.
"""

from lookalike_api.client.client import Client
from lookalike_api.client.connection import Json
from lookalike_api.client.following import FINAL_STATES

__all__ = ["FINAL_STATES", "Client", "Json"]
