"""Put listed records behind the switch: find where they sit, move them out, check that they are gone."""
