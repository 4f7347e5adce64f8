"""Many pictures from a ComfyUI workflow: prompts × people, over one or several servers, each picture once.

``feedface_core.files.tasks`` reads tasks from files, ``workflow`` finds the inputs that they fill, ``plan`` makes jobs
of them, ``journal`` remembers what became of each, ``worker`` carries them out on a server, ``pool`` shares them out.
"""
