"""`magihuman serve`: videos over HTTP. Needs the extra `[serve]`; nothing else imports it."""
