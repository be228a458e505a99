"""Serve the page to browsers on this machine, and to nobody else."""

from __future__ import annotations

import socket
import webbrowser

from fastloss import _checks as checks

ADDRESS = "127.0.0.1"
PORT = 5006



def serve(port: int = PORT, *, browser: bool = True) -> None:
    """Serve the page until Ctrl-C, at http://127.0.0.1:PORT/.

    The server listens on the loopback device alone. It answers requests that name this machine, and takes websockets
    from its own page: a page of another origin, opened in the same browser, can neither read nor steer it.

    Parameters
    ----------
    port : int
        Where to listen; 0 takes a port that is free.
    browser : bool
        Open the page in a browser.

    Raises
    ------
    ImportError
        Without Bokeh.
    OSError
        If the port cannot be listened on.
    ValueError, TypeError
        If `port` is no port.
    """
    checks.integer(port, "port", low=0)
    if port > 65535:
        raise ValueError(f"port is {port}; it must be at most 65535")
    try:
        from bokeh.application import Application
    except ImportError as error:
        raise ImportError('the demo needs Bokeh: pip install "fastloss[demo]"') from error
    import asyncio

    from bokeh.application.handlers import FunctionHandler
    from bokeh.server.server import BaseServer
    from bokeh.server.tornado import BokehTornado
    from bokeh.settings import settings
    from tornado.httpserver import HTTPServer
    from tornado.ioloop import IOLoop
    from tornado.routing import HostMatches, Rule, RuleRouter

    from fastloss.demo import page

    settings.resources = "server"  # scripts and styles from here, whatever the environment says: no internet is needed
    try:
        listening = socket.create_server((ADDRESS, port))
    except OSError as error:
        raise OSError(f"port {port} cannot be listened on ({error.strerror}); name another, or 0 for any") from error
    listening.setblocking(False)
    port = listening.getsockname()[1]
    asyncio.set_event_loop(asyncio.new_event_loop())
    names = (ADDRESS, "localhost")
    pages = BokehTornado(
        Application(FunctionHandler(page.make)), extra_websocket_origins=[f"{name}:{port}" for name in names]
    )
    http = HTTPServer(RuleRouter([Rule(HostMatches("|".join(name.replace(".", r"\.") for name in names)), pages)]))
    server = BaseServer(IOLoop.current(), pages, http)
    http.add_socket(listening)
    server.start()
    url = f"http://{ADDRESS}:{port}/"
    print(f"The page is at {url}, for browsers on this machine. Ctrl-C ends it.", flush=True)
    if browser:
        webbrowser.open(url)
    server.run_until_shutdown()
