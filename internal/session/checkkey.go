package session

import "context"

// CheckKey mints one token with an app's key, in the first region that its
// sessions would use, and discards it. That opens no session and costs nothing.
// It returns nil if the backend accepts the key, and otherwise an *errors.Error
// as Open would; HTTPStatus 401 means that the key was refused.
func (c *Client) CheckKey(ctx context.Context, app string, key func() (string, error)) error {
	if err := c.beginOpen(); err != nil {
		return err
	}
	defer c.wg.Done()
	o := &opening{c: c, p: &Params{AppID: app, APIKey: key}}
	regions, err := o.regions(ctx)
	if err != nil {
		return err
	}
	o.red.region = regions[0]
	value, err := o.apiKey()
	if err != nil {
		return err
	}
	_, err = o.askToken(ctx, regions[0], value)
	return err
}
