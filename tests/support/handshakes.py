"""Handshakes of the tests of the gateway."""

GUEST = {"client": "participant", "lesson_id": "1"}

PARTICIPANT = {**GUEST, "access_token": "student:p-1"}

TEACHER = {"client": "teacher", "lesson_id": "1", "access_token": "teacher:t-1"}
