from graft.rendering.render import *  # noqa
from graft.rendering.render import Renderer  # noqa
