"""The interface of MMEngine 0.10, implemented with Stratagem.

Importing this package makes ``mmengine`` refer to it, in this process and in the processes that :mod:`multiprocessing` starts.
Import it before anything that imports ``mmengine``::

    import stratagem.compat.mmengine  # isort: skip
    from mmengine.runner import Runner

``stratagem run-mmengine SCRIPT ...`` does the same for a script that is not changed. The modules of this package have the names
of MMEngine's modules, so each ``mmengine.<module>`` is ``stratagem.compat.mmengine.<module>``.
"""

from stratagem.compat.mmengine import alias

alias.install()
