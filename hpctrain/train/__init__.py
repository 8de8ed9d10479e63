"""The built-in trainers. They run inside jobs and are imported by nobody else; heavy packages are
imported where used."""
