"""Try a join: a page on which a newcomer sees the statechart of a join walk (contract, section 11).

It is on in the embedded set-up only, for requests from this machine.
"""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tornado.web import HTTPError

from lesson_server.errors import StoreUnavailable
from lesson_server.gateway.tracing import Tracing
from lesson_server.http.access import Access
from lesson_server.http.api import ApiError, ApiHandler
from lesson_server.http.page import PageHandler
from lesson_server.http.stream import StreamHandler
from lesson_server.settings.schema import SettingsError
from lesson_server.stores.rds.lesson import LESSON_ID
from lesson_server.tokens import TokenVerifier

# The official client, where ``make try`` installs it.
CLIENT = Path(sys.prefix) / "client/node_modules/socket.io-client/dist/socket.io.esm.min.js"
# Lessons that the page offers.
MAX_LESSONS = 100
# Seconds for which the tokens of the page are valid.
TOKEN_LIFE = 60 * 60
# The role of a participant who tries a join.
ROLE = "student"


class TryRequest(BaseModel):
    """Who wants to try a join, and of which lesson."""

    model_config = ConfigDict(extra="forbid")

    client: str = Field(pattern="^(teacher|participant|guest)$")
    lesson_id: str = Field(pattern=f"^{LESSON_ID.pattern}$")
    name: str = ""


class TrialPageHandler(PageHandler):
    """The page."""

    def initialize(  # type: ignore[override]
        self, access: Access, charts: list[dict[str, Any]], list_lessons: Callable[[], Awaitable[list[str]]]
    ) -> None:
        super().initialize(access)
        self.charts = charts
        self.list_lessons = list_lessons

    async def get(self) -> None:
        try:
            lessons = await self.list_lessons()
        except StoreUnavailable:
            raise ApiError(503, "RDS is unavailable, try again") from None
        self.show("try.html", charts=self.charts, client_available=CLIENT.is_file(), lessons=lessons[:MAX_LESSONS])


class TrialClientHandler(PageHandler):
    """The official Socket.IO client."""

    def get(self) -> None:
        if not CLIENT.is_file():
            raise HTTPError(404)
        self.set_header("Content-Type", "text/javascript")
        self.finish(CLIENT.read_bytes())


class TrialTokenHandler(ApiHandler):
    """Answers with the ``auth`` object of a handshake."""

    def initialize(self, access: Access, tokens: TokenVerifier) -> None:  # type: ignore[override]
        super().initialize(access)
        self.tokens = tokens

    def post(self) -> None:
        try:
            request = TryRequest.model_validate(orjson.loads(self.request.body))
            auth = {"client": "participant", "lesson_id": request.lesson_id}
            if request.client == "teacher":
                auth |= {"client": "teacher", "access_token": self.tokens.mint(request.name, "teacher", TOKEN_LIFE)}
            elif request.client == "participant":
                auth["access_token"] = self.tokens.mint(request.name, ROLE, TOKEN_LIFE)
        except (orjson.JSONDecodeError, ValidationError):
            raise ApiError(400, "the request needs a client, a lesson_id and a name") from None
        except SettingsError:
            sentence = "auth.key is a public key, which can't sign a token, so only a guest can be tried"
            raise ApiError(409, sentence) from None
        except ValueError:
            raise ApiError(400, "the name has characters that an id can't have") from None
        self.answer({"auth": auth})


class TrialStepsHandler(StreamHandler):
    """What happens on a connection, step by step."""

    def initialize(self, access: Access, tracing: Tracing) -> None:  # type: ignore[override]
        super().initialize(access)
        self.tracing = tracing

    async def get(self) -> None:
        await self.serve(self.tracing.events(self.get_query_argument("sid")))
