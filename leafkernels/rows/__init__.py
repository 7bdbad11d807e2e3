"""From a call to where its tokens lie and whose they are."""
